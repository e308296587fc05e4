"""Kit for tests of plugins and of gmta itself: fake sessions, services and stores, the dialogue player."""
