"""Channels in files of Keras: the configuration is the graph."""
