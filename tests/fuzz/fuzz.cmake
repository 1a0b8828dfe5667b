# tests/fuzz/fuzz_NAME.c -> bin/fuzz_NAME, a libFuzzer program with address and undefined-behaviour
# sanitizers; everything of ours it links is instrumented too. Only with -DMOE_FUZZ=ON and clang;
# tests/fuzz/run.sh does it all.
if(MOE_FUZZ)
  if(NOT CMAKE_C_COMPILER_ID STREQUAL Clang OR NOT CMAKE_CXX_COMPILER_ID STREQUAL Clang)
    message(FATAL_ERROR "MOE_FUZZ: libFuzzer comes with clang: configure with "
      "-DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++, or run tests/fuzz/run.sh")
  endif()
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=undefined)
  # -Wno-pass-failed: loops that sanitizers keep from being vectorized are none of our concern here.
  target_compile_options(moe_flags INTERFACE ${sanitizers} -fsanitize=fuzzer-no-link
    -Wno-pass-failed)
  target_link_options(moe_flags INTERFACE ${sanitizers})

  # The leftmost layer that has what a fuzzer calls; moe_checkpoint when not named here.
  set(fuzz_config_layer moe_base)
  set(fuzz_idx_layer moe_data)
  set(fuzz_tokenizer_layer moe_data)

  add_custom_target(fuzzers)
  file(GLOB sources CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/fuzz/fuzz_*.c)
  foreach(source ${sources})
    get_filename_component(name ${source} NAME_WE)
    if(NOT DEFINED ${name}_layer)
      set(${name}_layer moe_checkpoint)
    endif()
    add_executable(${name} EXCLUDE_FROM_ALL ${source})
    target_link_libraries(${name} PRIVATE ${${name}_layer})
    target_link_options(${name} PRIVATE -fsanitize=fuzzer)
    add_dependencies(fuzzers ${name})
  endforeach()
endif()
