"""The whole path, from a teacher and a file of requests to a student and its report, in stages."""
