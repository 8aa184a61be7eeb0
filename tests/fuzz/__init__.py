"""Fuzzing: one function that looks at bytes as the commands do, and ways to make bytes that it may not like."""
