"""Which kernel runs, why the others do not, and what each is predicted to take. Knows no kernel."""
