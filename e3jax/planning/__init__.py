"""What a run takes, before anything is rented: tokens and bytes, memory, time, the best mesh."""
