"""What the rooms hand to each other: frozen records, one file a noun, with their JSON form (`form.py`)."""
