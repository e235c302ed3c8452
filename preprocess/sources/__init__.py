"""Where images come from: class folders, archives, lists of labels."""
