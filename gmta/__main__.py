"""python -m gmta"""

from gmta.cli import main

if __name__ == "__main__":
    main()
