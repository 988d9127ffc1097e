"""Firefly Studio: the whole path in a web page. It holds no logic: what it does, the command line does."""
