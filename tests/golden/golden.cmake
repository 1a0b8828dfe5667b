# tests/golden/golden_check.c: a program that runs any golden file; check.sh starts it under mpirun.
moe_test_program(golden_check ${CMAKE_CURRENT_LIST_DIR}/golden_check.c moe_training)

# golden(NAME FILE ARGS...): one run of check.sh.
function(golden name file)
  add_test(NAME golden.${name}
    COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/golden/check.sh ${CMAKE_CURRENT_SOURCE_DIR}/golden/${file}.h5 ${ARGN})
  set_tests_properties(golden.${name} PROPERTIES TIMEOUT 300
    ENVIRONMENT "${MOE_TEST_ENV};MOE_BUILD=${CMAKE_BINARY_DIR}")
endfunction()

foreach(ranks 1 2 4)
  golden(tiny-${ranks} tiny-1 --ranks ${ranks})
  golden(tiny16-${ranks} tiny16-2 --ranks ${ranks})
  foreach(mode swiglu experts block)
    golden(tiny-${ranks}-${mode} tiny-1 --ranks ${ranks} --recompute ${mode})
    golden(tiny16-${ranks}-${mode} tiny16-2 --ranks ${ranks} --recompute ${mode})
  endforeach()
endforeach()
golden(tiny16-8 tiny16-2 --ranks 8)
foreach(ranks 3 16) # experts and batch that the ranks do not divide; more ranks than sequences
  golden(tiny16-${ranks} tiny16-2 --ranks ${ranks})
endforeach()
golden(tiny16-16-ep4 tiny16-2 --ranks 16 --set parallel.ep=4 --set parallel.zero1=true)
golden(tiny16-8-zero1 tiny16-2 --ranks 8 --set parallel.zero1=true)
golden(tiny16-2-ep1-zero1 tiny16-2 --ranks 2 --set parallel.ep=1 --set parallel.zero1=true)
golden(tiny16-8-ep1-zero1 tiny16-2 --ranks 8 --set parallel.ep=1 --set parallel.zero1=true)
golden(tiny16-8-ep4 tiny16-2 --ranks 8 --set parallel.ep=4)
golden(tiny16-8-ep2 tiny16-2 --ranks 8 --set parallel.ep=2)
golden(tiny16-8-ep1 tiny16-2 --ranks 8 --set parallel.ep=1)
golden(tiny16-4-allgather tiny16-2 --ranks 4 --set parallel.exchange=allgather)
golden(tiny16-4-per-expert tiny16-2 --ranks 4) # rows are not deduplicated
set_property(TEST golden.tiny16-4-per-expert APPEND PROPERTY ENVIRONMENT MOE_DEDUP=off)
golden(tiny-2-bf16 tiny-1 --ranks 2 --dtype bf16)
golden(tiny16-2-bf16 tiny16-2 --ranks 2 --dtype bf16)
