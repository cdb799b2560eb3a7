"""What people look at: figures, reports, pages."""
