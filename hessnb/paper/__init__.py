"""What the paper published, and how it stands beside what was measured here."""
