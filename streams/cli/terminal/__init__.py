"""What commands read from and write to a terminal: numbers of options, times, foreign text, encodings."""
