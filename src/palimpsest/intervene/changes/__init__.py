"""What an intervention is made of: changes of weights and of states."""
