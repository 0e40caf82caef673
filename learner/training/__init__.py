"""One update of an adapter: schedule the rows, run the optimizer steps, judge the result at the gate."""
