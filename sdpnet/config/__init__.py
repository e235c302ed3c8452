"""The options of a training, and how they are read from YAML files and the command line."""
