"""Tests of magic: exactness first."""
