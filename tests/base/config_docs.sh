#!/bin/sh
# config_docs.sh PROGRAM FILE: fail unless FILE is what PROGRAM prints.
program=$1 file=$2
if "$program" | diff -u "$file" -; then exit 0; fi
echo "$file differs from core/base/config_table.h: write it anew with" >&2
echo "    $program > $file" >&2
exit 1
