"""`kd sweep`: one file that stands for many runs, such as a paper's table; its plan, and how the plan is carried out."""
