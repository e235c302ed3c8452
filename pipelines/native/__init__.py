"""The crop decoder in C++, and how Python calls it."""
