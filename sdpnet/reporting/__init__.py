"""What a training reports while it runs, and the pages drawn from it afterwards."""
