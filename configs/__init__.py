"""The presets: one YAML file each, found by name (`longseq config list`)."""
