"""Labelled data of ordinary tasks, and the preference pairs made from it."""
