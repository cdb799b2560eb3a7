"""Figures, reports and web pages."""
