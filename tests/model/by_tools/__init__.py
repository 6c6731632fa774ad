"""Files that other tools wrote, and the program that had them do so."""
