"""Bulk generation: reads a table of jobs, distributes and generates the clips, and resumes interrupted runs."""
