"""The checkers of the book's exercises, one module for each chapter that has some.

`judging` says how an answer is judged; `check("04.2", mine)` finds the checker by the exercise's number.
"""
