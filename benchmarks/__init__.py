"""Measurements, side by side with what users have today: every speed claim of this project is a row written here."""
