"""The explorer: a page in the browser on which one picture, one question and a method can be tried out."""
