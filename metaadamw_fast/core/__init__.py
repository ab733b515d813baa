"""What every optimizer here needs, whatever its formula: nothing in this package knows one of them by name."""
