"""Will it fit, how fast, with which settings: from a config and a machine, on any CPU."""
