"""What retention requests mean for an example; shared by curate, retain, redrive and the learner."""
