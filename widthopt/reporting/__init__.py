"""Output for users: tables, figures, comparisons, states and the dashboard."""
