"""`python -m smartbird.demo`: Smart Bird beside dense attention on real text, with a report."""
