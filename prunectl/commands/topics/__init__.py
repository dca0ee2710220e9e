"""Short texts about one idea each, with facts from where they are used."""
