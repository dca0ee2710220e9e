"""The only room that talks to the user."""
