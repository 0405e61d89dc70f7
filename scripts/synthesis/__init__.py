"""Synthesis of a contrast CT from a native one."""
