"""What people read: terminal text (`text.py`) and the HTML page (`page.py`), made from records only."""
