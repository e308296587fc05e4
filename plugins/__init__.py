"""The bundled plugins, installed as gmta_plugins; each is an entry point of the group gmta.plugins."""
