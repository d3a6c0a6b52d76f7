"""What the scripts share: arguments, output, bars, words."""
