"""Any image file, as people have them, to pixels."""
