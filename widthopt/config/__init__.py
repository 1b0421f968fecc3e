"""From what a user typed to a `widthopt.request.Request`."""
