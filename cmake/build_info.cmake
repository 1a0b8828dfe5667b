# cmake -DSOURCE=... -DOUTPUT=... -P build_info.cmake: write the header that says what was built.
# It runs at every build and leaves the file alone when nothing changed.
execute_process(COMMAND git --no-optional-locks describe --always --dirty --abbrev=12 --match=
  WORKING_DIRECTORY ${SOURCE} OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT commit)
  set(commit unknown)
endif()
set(text "#define MOE_COMMIT \"${commit}\"\n#define MOE_COMPILER \"${COMPILER}\"\n")
set(before "")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} before)
endif()
if(NOT text STREQUAL before)
  file(WRITE ${OUTPUT} "${text}")
endif()
