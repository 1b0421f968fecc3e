"""What a person sees: tables, figures, and one page of them."""
