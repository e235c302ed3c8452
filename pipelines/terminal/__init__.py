"""What every command line shares: flags, advice on the next step and on what is missing, lasting output."""
