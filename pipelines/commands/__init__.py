"""The commands, one module for each group of them; ``pipelines.cli`` lists them all.

Each is a thin function: it reads its options, calls what does the work, and prints. What loads
torch, pydantic or rich is imported inside the functions.
"""
