"""What a job will take on TPUs that are not here: memory, time and cost, from programs compiled for them."""
