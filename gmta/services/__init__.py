"""What the engine and the plugins are handed: log, metrics, TLS contexts, resolver, native-thread batches."""
