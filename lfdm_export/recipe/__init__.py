"""Recipes: every run that makes a model from nothing, declared in order and made by one command."""
