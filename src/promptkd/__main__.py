from promptkd.cli import main

main()
