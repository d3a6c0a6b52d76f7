"""Long trials that would lose somebody's work if they failed; quick ones stand in tests/."""
