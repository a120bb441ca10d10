"""What this project's time and memory are measured by: `make bench`, side by side with the peers users have."""
