"""How a save is spread over its window: arithmetic over sizes and measured rates."""
