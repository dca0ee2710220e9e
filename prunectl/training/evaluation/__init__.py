"""How good is a model on data, and how much worse is one than another?"""
